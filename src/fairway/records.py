"""Reading the JSON records that stages leave; a class beside each writer says what they hold."""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fairway.errors import UserError
from fairway.files import read_json
from fairway.settings import explain

Record = TypeVar("Record", bound=BaseModel)


def read_record(kind: type[Record], path: str | Path, made_by: str) -> Record:
    """A JSON file as a `kind`. made_by: what makes the file.

    Raises UserError where the file is missing, no JSON, or of another shape.
    """
    path = Path(path)
    values = read_json(path, made_by)
    try:
        return kind.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        folder, fault = str(path).removesuffix(path.name), explain(error, (path.name,))
        raise UserError(f"{folder}{fault}; expected the file made by {made_by}") from None

"""What happens when a run starts its jobs, when it ends and when it fails.

Only in the process that the user started, and not in a dry run.
"""

import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from fairway.errors import UserError
from fairway.files import write_json
from fairway.report.kept import keep
from fairway.resume import note_finish, note_start, share_folder
from fairway.runs import PLAN, error_lines, plan_of


def start_run(run):
    """Before the first job: set times right, and note what runs, for `fairway resume` and `watch`."""
    if workflow.touch:
        return
    if not workflow.local_exec:
        # As Ctrl-C: Snakemake would wait for the end of jobs that may not have begun.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    share_folder()  # again, for a `workdir:` may have followed
    set_future_times_right()
    write_json(f"{RUN}/{PLAN}", plan_of(CONFIG).model_dump(mode="json"))
    keep_older_report()
    settings = workflow.dag_settings
    forced = bool(settings.forceall or settings.forcetargets or settings.forcerun)
    if forced:
        # A resumed run forces nothing: what is incomplete runs again, and what has run does not.
        for job in workflow.dag.needrun_jobs():
            workflow.persistence.started(job)
    if is_typed():
        folder = os.path.relpath(run["typed_in"])
        try:
            run["mark"] = note_start(
                sys.argv[1:], folder, forced=forced, resumed=run["resumed"]
            )
        except UserError as error:
            raise WorkflowError(str(error)) from None


# As a workflow that uses this one as a module names it.
REPORT_RULE = workflow.modifier.modify_rulename("run_report")


def keep_older_report():
    """Copy the report that is about to be made again: Snakemake deletes it before the job."""
    if REPORT_RULE in {job.rule.name for job in workflow.dag.needrun_jobs()}:
        try:
            kept = keep(Path(RUN) / "report")
        except UserError as error:
            raise WorkflowError(str(error)) from None
        if kept:
            logger.info(
                f"{RUN}/report is made again: a copy stays in {kept} if the new one says otherwise"
            )


def finish_run(run):
    if "mark" in run:
        note_finish(run["mark"])


def tell_errors(run):
    """The failed stages' own lines, after all of Snakemake's, and how to go on."""
    logs = [path for job in workflow.scheduler.failed for path in job.log]
    for path in filter(os.path.exists, logs):
        text = Path(path).read_text(errors="replace")
        errors = error_lines(text)
        last = next(filter(str.strip, reversed(text.split("\n"))), "nothing")
        told = errors[-1] if errors else f"ends without an error line, with: {last}"
        logger.error(f"{path}: {told}")
    if "mark" in run:
        command = "fairway resume"
        if not shutil.which("fairway", path=USERS_PATH):
            home, python = shlex.quote(str(HOME / "src")), shlex.quote(sys.executable)
            command = f"PYTHONPATH={home} {python} -m fairway.resume"
        logger.error(f"To go on with what is left: {command}")
    tell_other_seeds()


def tell_other_seeds():
    """How the seeds that did not fail come to a report, which then names those that it lacks."""
    failed = {
        int(job.wildcards.seed)
        for job in workflow.scheduler.failed
        if "seed" in job.wildcards.keys()
    }
    others = [seed for seed in CONFIG.seeds if seed not in failed]
    if failed and others:
        seeds = f"seeds=[{','.join(map(str, others))}]"
        typed = workflow.config_settings.config_args or []
        kept = [one for one in typed if not one.startswith("seeds=")]
        words = shlex.join([*kept, seeds])
        logger.error(
            f"For a report of the other seeds, which says that {', '.join(map(str, sorted(failed)))} "
            f"is missing: the same command with --config {words}"
        )


def is_typed():
    """Whether this is the program `snakemake`, rather than one that uses its Python interface."""
    program = Path(sys.argv[0])
    return "snakemake" in (program.stem, program.parent.name)


def get_typing_folder():
    """The folder that paths on the command line start from; Snakemake went from it to another."""
    shell, there = Path(os.environ.get("PWD", "")), workflow.overwrite_workdir
    if there is not None and (shell / there).resolve() == Path.cwd():
        return shell
    return Path.cwd()


def set_future_times_right():
    """Bring inputs whose times lie ahead, from a clock that did, back to now.

    Snakemake would fail a job, and delete what it made, as older than its input.
    """
    now = time.time()
    inputs = {str(path) for job in workflow.dag.needrun_jobs() for path in job.input}
    ahead = [
        path
        for path in map(get_timestamp_file, inputs)
        if os.path.lexists(path) and os.lstat(path).st_mtime > now
    ]
    for path in ahead:
        try:
            os.utime(path, (now, now), follow_symlinks=False)
        except OSError as error:
            raise WorkflowError(
                f"{path} has a time in the future, which cannot be changed ({error.strerror}): "
                "set the clock or the file's time right"
            ) from None
    if ahead:
        logger.info(
            f"{len(ahead)} input files had times in the future, from a clock that was ahead: they "
            "have the present time now"
        )


def get_timestamp_file(path):
    """The file whose time is that of `path` to Snakemake, which has its own in folders."""
    stamp = os.path.join(path, ".snakemake_timestamp")
    return stamp if os.path.isfile(stamp) and not os.path.islink(path) else path


def add_hook(event, step):
    """Let `step` precede the user's `onstart:` and the like, wherever one stands.

    Snakemake takes only the last of them, and none of a module.
    """
    register = getattr(workflow, event)

    def with_step(handler):
        def both(log):
            step()
            handler(log)

        return both

    setattr(workflow, f"_{event}", with_step(getattr(workflow, f"_{event}")))
    setattr(workflow, event, lambda handler: register(with_step(handler)))


if workflow.is_main_process:
    NOTED_RUN = {"typed_in": get_typing_folder(), "resumed": share_folder()}
    add_hook("onstart", lambda: start_run(NOTED_RUN))
    add_hook("onsuccess", lambda: finish_run(NOTED_RUN))
    add_hook("onerror", lambda: tell_errors(NOTED_RUN))

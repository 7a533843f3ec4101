"""The workflow's entry from the checkout: `snakemake --cores 2`, with config.yaml beside this file."""


include: "workflow/Snakefile"

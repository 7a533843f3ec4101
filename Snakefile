"""The workflow's entry from the checkout: `snakemake --cores 2`, with config.yaml beside this file."""


include: "workflow/Snakefile"


# A rule of an included file is never the default target.
rule everything:
    default_target: True
    input:
        rules.all.input,
    localrule: True

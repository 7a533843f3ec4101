"""Fairway: tokenize → train → EMA → TTT → GPTQ → SLOT-eval → report, with an audit of every score."""

from snakemake.utils import min_version

min_version("9.19")


configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/tokenize.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/ema.smk"
include: "workflow/rules/ttt.smk"
include: "workflow/rules/gptq.smk"
include: "workflow/rules/slot_eval.smk"
include: "workflow/rules/audit.smk"
include: "workflow/rules/report.smk"


localrules:
    all,
    tokenize,
    train,
    ema,
    ttt,
    gptq,
    slot_eval,
    audit,
    report,


rule all:
    default_target: True
    input:
        rules.write_report.output,


# One target for each stage: it builds the stage for every seed (and variant) with what it needs.


rule tokenize:
    input:
        rules.tokenize_text.output,


rule train:
    input:
        get_stage_files("train"),


rule ema:
    input:
        get_stage_files("ema"),


rule ttt:
    input:
        get_stage_files("ttt"),


rule gptq:
    input:
        get_stage_files("gptq"),


rule slot_eval:
    input:
        get_stage_files("slot"),


rule audit:
    input:
        get_stage_files("audit"),


rule report:
    input:
        rules.write_report.output,

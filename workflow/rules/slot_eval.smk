rule evaluate_slot:
    input:
        dataset=ancient(rules.tokenize_text.output.dataset),
        provenance=rules.quantise_gptq.output.provenance,
        artifact=ancient(rules.quantise_gptq.output.artifact),
    output:
        tokens=f"{VARIANT}/slot/tokens.parquet",
        metrics=f"{VARIANT}/slot/metrics.json",
        provenance=f"{VARIANT}/slot/provenance.json",
    log:
        f"{LOGS}/seed-{{seed}}/{{variant}}/slot.log",
    benchmark:
        f"{RUN}/benchmarks/seed-{{seed}}/{{variant}}/slot.tsv"
    conda:
        get_environment()
    threads: 1
    resources:
        launcher="python",
        runtime=60,
        mem_mb=4000,
    params:
        gptq=subpath(input.provenance, parent=True),
        folder=subpath(output.tokens, parent=True),
        settings=get_settings("slot"),
        code=get_code("slot_eval.py"),
    message:
        "slot_eval: seed {wildcards.seed}, {wildcards.variant}"
    shell:
        "{resources.launcher} $FAIRWAY_HOME/workflow/scripts/slot_eval.py"
        " --settings {params.settings:q} --variant {wildcards.variant} --seed {wildcards.seed}"
        " --dataset {input.dataset:q}/manifest.json --artifact {params.gptq:q} --output {params.folder:q}"
        " > {log:q} 2>&1"

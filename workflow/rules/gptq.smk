rule quantise_gptq:
    input:
        dataset=ancient(rules.tokenize_text.output.dataset),
        provenance=rules.adapt_ttt.output.provenance,
        weights=ancient(rules.adapt_ttt.output.weights),
    output:
        artifact=f"{VARIANT}/gptq/artifact.bin",
        layers=f"{VARIANT}/gptq/layers.parquet",
        metrics=f"{VARIANT}/gptq/metrics.json",
        provenance=f"{VARIANT}/gptq/provenance.json",
    log:
        f"{LOGS}/seed-{{seed}}/{{variant}}/gptq.log",
    benchmark:
        f"{RUN}/benchmarks/seed-{{seed}}/{{variant}}/gptq.tsv"
    conda:
        get_environment()
    threads: 1
    resources:
        runtime=60,
        mem_mb=4000,
    params:
        weights=subpath(input.provenance, parent=True),
        folder=subpath(output.artifact, parent=True),
        settings=get_settings("gptq"),
        code=get_code("gptq.py"),
    message:
        "gptq: seed {wildcards.seed}, {wildcards.variant}"
    shell:
        "python $FAIRWAY_HOME/workflow/scripts/gptq.py"
        " --settings {params.settings:q} --variant {wildcards.variant} --seed {wildcards.seed}"
        " --dataset {input.dataset:q}/manifest.json --weights {params.weights:q} --output {params.folder:q}"
        " > {log:q} 2>&1"

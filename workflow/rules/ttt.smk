rule adapt_ttt:
    input:
        dataset=ancient(rules.tokenize_text.output.dataset),
        provenance=rules.average_ema.output.provenance,
        weights=ancient(rules.average_ema.output.weights),
    output:
        weights=f"{VARIANT}/ttt/weights.safetensors",
        metrics=f"{VARIANT}/ttt/metrics.json",
        provenance=f"{VARIANT}/ttt/provenance.json",
    log:
        f"{LOGS}/seed-{{seed}}/{{variant}}/ttt.log",
    benchmark:
        f"{RUN}/benchmarks/seed-{{seed}}/{{variant}}/ttt.tsv"
    conda:
        get_environment()
    threads: 1
    resources:
        launcher="python",
        runtime=60,
        mem_mb=4000,
    params:
        ema=subpath(input.provenance, parent=True),
        folder=subpath(output.weights, parent=True),
        settings=get_settings("ttt"),
        code=get_code("ttt.py"),
    message:
        "ttt: seed {wildcards.seed}, {wildcards.variant}"
    shell:
        "{resources.launcher} $FAIRWAY_HOME/workflow/scripts/ttt.py"
        " --settings {params.settings:q} --variant {wildcards.variant} --seed {wildcards.seed}"
        " --dataset {input.dataset:q}/manifest.json --ema {params.ema:q} --output {params.folder:q}"
        " > {log:q} 2>&1"

rule average_ema:
    input:
        dataset=ancient(rules.tokenize_text.output.dataset),
        # The provenance holds the hashes of the bulky files beside it and stands for their
        # changes, so that touching or copying gigabytes reruns nothing.
        provenance=rules.train_model.output.provenance,
        weights=ancient(rules.train_model.output.weights),
        averages=ancient(rules.train_model.output.averages),
    output:
        weights=f"{SHARED}/ema/weights.safetensors",
        metrics=f"{SHARED}/ema/metrics.json",
        provenance=f"{SHARED}/ema/provenance.json",
    log:
        f"{LOGS}/seed-{{seed}}/ema.log",
    benchmark:
        f"{RUN}/benchmarks/seed-{{seed}}/ema.tsv"
    conda:
        get_environment()
    threads: 1
    resources:
        runtime=30,
        mem_mb=4000,
    params:
        train=subpath(input.provenance, parent=True),
        folder=subpath(output.weights, parent=True),
        settings=get_settings("ema"),
        code=get_code("ema.py"),
    message:
        "ema: seed {wildcards.seed}"
    shell:
        "python $FAIRWAY_HOME/workflow/scripts/ema.py"
        " --settings {params.settings:q} --seed {wildcards.seed} --dataset {input.dataset:q}/manifest.json"
        " --train {params.train:q} --output {params.folder:q} > {log:q} 2>&1"

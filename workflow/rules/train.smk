rule train_model:
    input:
        dataset=ancient(rules.tokenize_text.output.dataset),
        manifest=rules.tokenize_text.output.manifest,
    output:
        weights=f"{SHARED}/train/weights.safetensors",
        averages=f"{SHARED}/train/averages.safetensors",
        curve=f"{SHARED}/train/metrics.parquet",
        metrics=f"{SHARED}/train/metrics.json",
        provenance=f"{SHARED}/train/provenance.json",
    log:
        f"{LOGS}/seed-{{seed}}/train.log",
    benchmark:
        f"{RUN}/benchmarks/seed-{{seed}}/train.tsv"
    conda:
        get_environment()
    threads: 1
    resources:
        launcher="python",
        runtime=60,
        mem_mb=4000,
    params:
        folder=subpath(output.weights, parent=True),
        # Mid-run state lies outside the outputs, which a failed job loses.
        checkpoints=f"{SHARED}/.checkpoints/train",
        settings=get_settings("train"),
        code=get_code("train.py"),
    message:
        "train: seed {wildcards.seed}, progress in {log}"
    shell:
        "{resources.launcher} $FAIRWAY_HOME/workflow/scripts/train.py"
        " --settings {params.settings:q} --seed {wildcards.seed}"
        " --dataset {input.dataset:q}/manifest.json --output {params.folder:q}"
        " --checkpoints {params.checkpoints:q} > {log:q} 2>&1"

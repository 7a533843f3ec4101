rule run_train:
    input:
        records=get_records("train"),
        products=ancient(get_products("train")),
    output:
        **get_outputs("train"),
    log:
        get_log("train"),
    benchmark:
        get_benchmark("train")
    priority: get_priority("train")
    conda:
        get_environment()
    threads: get_threads("train")
    resources:
        **get_resources("train"),
    params:
        **get_params("train"),
        # Mid-run state lies outside the outputs, which a failed job loses.
        checkpoints=f"{SEED}/{{folder}}/.checkpoints/train",
    message:
        "train: seed {wildcards.seed}, {wildcards.folder}; progress in {log}"
    shell:
        get_command("train", " --checkpoints {params.checkpoints:q}")

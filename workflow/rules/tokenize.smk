rule run_tokenize:
    input:
        get_source_files,
    output:
        dataset=directory(DATASET),
        # A folder has no checksum and its age says little (copies, caches, symbolic links), so
        # this copy of its manifest, with every shard's hash, stands for the folder's changes.
        manifest=f"{DATASET}.manifest.json",
    log:
        str(RESULTS / "logs/tokenize_{dataset}.log"),
    cache: "omit-software"
    retries: 2 if is_fetched() else None
    conda:
        "../../envs/cpu.yaml"
    # As many as come with all GPUs of a node, so that every node that can train has them.
    threads: max(2, THREADS_PER_GPU * MACHINE_GPUS)
    resources:
        runtime=get_runtime("tokenize"),
        mem_mb=get_memory("tokenize"),
    params:
        settings=get_settings("tokenize"),
        code=get_code("tokenize"),
    message:
        "tokenize: making the dataset {output.dataset}"
    shell:
        get_call("tokenize")
        + " --threads {threads} --output {output.dataset:q}"
        + get_end("tokenize")
        + " && cp {output.dataset:q}/manifest.json {output.manifest:q}"

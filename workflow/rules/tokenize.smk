rule tokenize_text:
    output:
        manifest=f"{DATA}/manifest.json",
        provenance=f"{DATA}/provenance.json",
        metrics=f"{DATA}/metrics.json",
    log:
        f"{config['results']}/logs/tokenize_{config['data']['name']}.log",
    benchmark:
        f"{config['results']}/benchmarks/tokenize_{config['data']['name']}.tsv"
    retries: 1 if config["data"]["source"] == "huggingface" else 0
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        runtime=240,
        mem_mb=4000,
    params:
        folder=subpath(output.manifest, parent=True),
        settings=get_settings("tokenize"),
        code=get_code("tokenize_text.py"),
    message:
        "tokenize: making the dataset {params.folder}"
    shell:
        "python $FAIRWAY_HOME/workflow/scripts/tokenize_text.py"
        " --settings {params.settings:q} --output {params.folder:q} > {log:q} 2>&1"

rule tokenize_text:
    input:
        get_source_files(),
    output:
        directory(DATA),
    log:
        f"{config['results']}/logs/tokenize_{config['data']['name']}.log",
    cache: "omit-software"
    retries: 2 if config["data"]["source"] == "huggingface" else 0
    conda:
        "../../envs/cpu.yaml"
    threads: 2
    resources:
        runtime=240,
        mem_mb=4000,
    params:
        settings=get_settings("tokenize"),
        code=get_code("tokenize_text.py"),
    message:
        "tokenize: making the dataset {output}"
    shell:
        "python $FAIRWAY_HOME/workflow/scripts/tokenize_text.py --settings {params.settings:q}"
        " --threads {threads} --output {output:q} > {log:q} 2>&1"

rule run_ema:
    input:
        records=get_records("ema"),
        products=ancient(get_products("ema")),
    output:
        **get_outputs("ema"),
    log:
        get_log("ema"),
    benchmark:
        get_benchmark("ema")
    priority: get_priority("ema")
    conda:
        get_environment()
    threads: get_threads("ema")
    resources:
        **get_resources("ema"),
    params:
        **get_params("ema"),
    message:
        "ema: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("ema")

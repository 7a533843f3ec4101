rule ema:
    input:
        get_target("ema"),
    localrule: True


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
        gpu=get_gpus("ema"),
        runtime=get_runtime("ema"),
        mem_mb=get_memory("ema"),
    params:
        settings=get_settings("ema"),
        code=get_code("ema"),
        options=get_options("ema"),
    message:
        "ema: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("ema")

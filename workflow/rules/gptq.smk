rule gptq:
    input:
        get_target("gptq"),
    localrule: True


rule run_gptq:
    input:
        records=get_records("gptq"),
        products=ancient(get_products("gptq")),
    output:
        **get_outputs("gptq"),
    log:
        get_log("gptq"),
    benchmark:
        get_benchmark("gptq")
    priority: get_priority("gptq")
    conda:
        get_environment()
    threads: get_threads("gptq")
    resources:
        gpu=get_gpus("gptq"),
        runtime=get_runtime("gptq"),
        mem_mb=get_memory("gptq"),
    params:
        settings=get_settings("gptq"),
        code=get_code("gptq"),
        options=get_options("gptq"),
    message:
        "gptq: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("gptq")

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
        **get_resources("gptq"),
    params:
        **get_params("gptq"),
    message:
        "gptq: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("gptq")

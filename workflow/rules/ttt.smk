rule ttt:
    input:
        get_target("ttt"),
    localrule: True


rule run_ttt:
    input:
        records=get_records("ttt"),
        products=ancient(get_products("ttt")),
    output:
        **get_outputs("ttt"),
    log:
        get_log("ttt"),
    benchmark:
        get_benchmark("ttt")
    priority: get_priority("ttt")
    conda:
        get_environment()
    threads: get_threads("ttt")
    resources:
        gpu=get_gpus("ttt"),
        runtime=get_runtime("ttt"),
        mem_mb=get_memory("ttt"),
    params:
        settings=get_settings("ttt"),
        code=get_code("ttt"),
        options=get_options("ttt"),
    message:
        "ttt: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("ttt")

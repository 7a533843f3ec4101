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
        **get_resources("ttt"),
    params:
        **get_params("ttt"),
    message:
        "ttt: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("ttt")

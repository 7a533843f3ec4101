rule run_slot_eval:
    input:
        records=get_records("slot_eval"),
        products=ancient(get_products("slot_eval")),
    output:
        **get_outputs("slot_eval"),
    log:
        get_log("slot_eval"),
    benchmark:
        get_benchmark("slot_eval")
    priority: get_priority("slot_eval")
    conda:
        get_environment()
    threads: get_threads("slot_eval")
    resources:
        **get_resources("slot_eval"),
    params:
        **get_params("slot_eval"),
    message:
        "slot_eval: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("slot_eval")

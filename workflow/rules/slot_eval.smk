rule slot_eval:
    input:
        get_target("slot_eval"),
    localrule: True


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
        gpu=get_gpus("slot_eval"),
        runtime=get_runtime("slot_eval"),
        mem_mb=get_memory("slot_eval"),
    params:
        settings=get_settings("slot_eval"),
        code=get_code("slot_eval"),
        options=get_options("slot_eval"),
    message:
        "slot_eval: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("slot_eval")

rule audit:
    input:
        get_target("audit"),
    localrule: True


rule run_audit:
    input:
        records=get_records("audit"),
        products=ancient(get_products("audit")),
    output:
        **get_outputs("audit", but=["audit.json"]),
        audit=report(
            f"{SEED}/{{folder}}/audit/audit.json",
            caption="../report/audit.rst",
            category="Audit",
            labels={"seed": "{seed}", "folder": "{folder}"},
        ),
    log:
        get_log("audit"),
    benchmark:
        get_benchmark("audit")
    conda:
        get_environment()
    threads: get_threads("audit")
    resources:
        gpu=get_gpus("audit"),
        runtime=get_runtime("audit"),
        mem_mb=get_memory("audit"),
    params:
        settings=get_settings("audit"),
        code=get_code("audit"),
        options=get_options("audit"),
    message:
        "audit: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("audit")

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
        **get_resources("audit"),
    params:
        **get_params("audit"),
    message:
        "audit: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command("audit")

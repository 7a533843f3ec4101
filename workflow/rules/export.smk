rule run_export:
    input:
        records=get_records("export"),
        seeds=get_measured_seeds,
        products=ancient(get_products("export")),
    output:
        **get_outputs("export"),
    log:
        get_log("export"),
    benchmark:
        get_benchmark("export")
    conda:
        get_environment()
    threads: get_threads("export")
    resources:
        **get_resources("export"),
    params:
        **get_params("export"),
        # Sorted, so that another order of seeds reruns nothing.
        seeds=sorted(CONFIG.seeds),
        logs=get_logs("audit"),
    message:
        "export: seed {wildcards.seed}, {wildcards.folder}"
    shell:
        get_command(
            "export", more_options=" --seeds {params.seeds} --logs {params.logs}"
        )

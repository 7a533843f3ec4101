rule run_report:
    input:
        records=get_stage_files(["provenance.json"]),
        products=ancient(get_report_files()),
    output:
        **get_outputs("report", but=["report.html"]),
        page=report(
            f"{RUN}/report/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"what": "the whole report"},
        ),
    log:
        f"{LOGS}/report.log",
    benchmark:
        f"{BENCHMARKS}/report.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        runtime=get_runtime("report"),
        mem_mb=get_memory("report"),
    params:
        run=subpath(output.page, ancestor=2),
        # Sorted, so that another order of seeds reruns nothing.
        seeds=sorted(CONFIG.seeds),
        # In the config's order: the first is the reference.
        variants=json.dumps(FOLDERS),
        settings=get_settings("report"),
        code=get_code("report"),
        template=get_hash("src/fairway/report/page.html.j2"),
        layout=get_hash("src/fairway/report/base.html.j2"),
    message:
        "report: {output.page}"
    shell:
        get_call("report") + " --run {params.run:q} --seeds {params.seeds}"
        " --variants {params.variants:q} --output {params.run:q}/report"
        + get_end("report")

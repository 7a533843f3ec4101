rule write_report:
    input:
        dataset=ancient(rules.tokenize_text.output.dataset),
        shared=[*get_stage_files("train"), *get_stage_files("ema")],
        stages=[
            path
            for stage in ("ttt", "gptq", "slot", "audit")
            for path in get_stage_files(stage)
        ],
        tokens=ancient(get_stage_files("slot", ["tokens.parquet"])),
    output:
        page=report(
            f"{RUN}/report/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"what": "the whole report"},
        ),
        stages=f"{RUN}/report/stages.parquet",
        summary=f"{RUN}/report/summary.parquet",
        comparisons=f"{RUN}/report/comparisons.parquet",
        gains=f"{RUN}/report/gains.parquet",
        provenance=f"{RUN}/report/provenance.json",
    log:
        f"{LOGS}/report.log",
    benchmark:
        f"{RUN}/benchmarks/report.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        runtime=30,
        mem_mb=4000,
    params:
        run=subpath(output.page, ancestor=2),
        seeds=config["seeds"],
        # Sorted, so that reordering the config's keys reruns nothing.
        variants=sorted(config["variants"]),
        folder=subpath(output.page, parent=True),
        settings=get_settings("report"),
        code=get_code("report.py"),
        template=get_hash("src/fairway/report/page.html.j2"),
    message:
        "report: {output.page}"
    shell:
        "python $FAIRWAY_HOME/workflow/scripts/report.py"
        " --settings {params.settings:q} --run-folder {params.run:q} --data-folder {input.dataset:q}"
        " --seeds {params.seeds} --variants {params.variants:q} --output {params.folder:q}"
        " > {log:q} 2>&1"

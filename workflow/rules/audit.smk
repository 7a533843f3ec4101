rule audit_score:
    input:
        dataset=ancient(rules.tokenize_text.output.dataset),
        train=rules.train_model.output.provenance,
        ema=rules.average_ema.output.provenance,
        ttt=rules.adapt_ttt.output.provenance,
        gptq=rules.quantise_gptq.output.provenance,
        slot=rules.evaluate_slot.output.provenance,
        artifact=ancient(rules.quantise_gptq.output.artifact),
        tokens=ancient(rules.evaluate_slot.output.tokens),
    output:
        audit=report(
            f"{VARIANT}/audit/audit.json",
            caption="../report/audit.rst",
            category="Audit",
            labels={"seed": "{seed}", "variant": "{variant}"},
        ),
        reach=f"{VARIANT}/audit/reach.parquet",
        metrics=f"{VARIANT}/audit/metrics.json",
        provenance=f"{VARIANT}/audit/provenance.json",
    log:
        f"{LOGS}/seed-{{seed}}/{{variant}}/audit.log",
    benchmark:
        f"{RUN}/benchmarks/seed-{{seed}}/{{variant}}/audit.tsv"
    conda:
        get_environment()
    threads: 1
    resources:
        runtime=60,
        mem_mb=4000,
    params:
        train=subpath(input.train, parent=True),
        ema=subpath(input.ema, parent=True),
        ttt=subpath(input.ttt, parent=True),
        gptq=subpath(input.gptq, parent=True),
        slot=subpath(input.slot, parent=True),
        folder=subpath(output.audit, parent=True),
        settings=get_settings("audit"),
        code=get_code("audit.py"),
    message:
        "audit: seed {wildcards.seed}, {wildcards.variant}"
    shell:
        "python $FAIRWAY_HOME/workflow/scripts/audit.py"
        " --settings {params.settings:q} --variant {wildcards.variant} --seed {wildcards.seed}"
        " --dataset {input.dataset:q}/manifest.json --train {params.train:q} --ema {params.ema:q}"
        " --ttt {params.ttt:q} --gptq {params.gptq:q} --slot {params.slot:q}"
        " --output {params.folder:q} > {log:q} 2>&1"

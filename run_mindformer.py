from lora_ms.cli.main import run_mindformer

raise SystemExit(run_mindformer())

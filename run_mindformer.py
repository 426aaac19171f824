from lora_ms.cli import run_mindformer

raise SystemExit(run_mindformer())

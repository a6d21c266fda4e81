"""What becomes of a result: JSON, scripts, pipelines, ComfyUI."""

_base_ = "mmdet::_base_/default_runtime.py"

custom_imports = dict(imports=["cbn_mmdet"], allow_failed_imports=False)

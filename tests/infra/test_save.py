import shutil
def test_save(router, activations, small_data, tiny_model):
    for n,p in {"router":router,"activations":activations,"small_data":small_data,"tiny_model":tiny_model}.items():
        shutil.copytree(p, f"/tmp/rxd/{n}", dirs_exist_ok=True)

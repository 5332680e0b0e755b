"""python -m compiled_fa.compat: what sources ask of flash_attn, found and judged."""

import ast
import importlib
import inspect
import textwrap

import pytest

from compiled_fa import compat
from compiled_fa.drop_in import limits, refused
from tools import flash_attn_names


def found(source):
    return {(f.line, f.what): (f.verdict, f.why) for f in compat.read(textwrap.dedent(source), "x.py")}


def test_names_by_every_way_of_importing_them():
    verdicts = found(
        """
        import flash_attn
        import flash_attn.bert_padding as padding
        from flash_attn.flash_attn_interface import flash_attn_func as attend, flash_attn_gpu
        from flash_attn.ops.triton import rotary
        flash_attn.flash_attn_varlen_func
        padding.pad_input
        rotary.apply_rotary
        flash_attn.layers.rotary.RotaryEmbedding
        attend.__name__
        flash_attn.__version__
        """
    )
    served = {what for (_, what), (verdict, _) in verdicts.items() if verdict == compat.SERVED}
    assert served == {
        "flash_attn",
        "flash_attn.bert_padding",
        "flash_attn.flash_attn_interface.flash_attn_func",
        "flash_attn.ops.triton.rotary",
        "flash_attn.flash_attn_varlen_func",
        "flash_attn.bert_padding.pad_input",
        "flash_attn.ops.triton.rotary.apply_rotary",
        "flash_attn.layers.rotary.RotaryEmbedding",
        "flash_attn.__version__",
    }
    assert verdicts.pop((4, "flash_attn.flash_attn_interface.flash_attn_gpu"))[0] == compat.LIMITED
    assert len(verdicts) == len(served)


@pytest.mark.parametrize(
    ("source", "what", "why"),
    [
        ("import flash_attn_interface", "flash_attn_interface", "FlashAttention 3"),
        ("from flash_attn.cute import flash_attn_func", "flash_attn.cute.flash_attn_func", "FlashAttention 4"),
        ("import flash_attn_2_cuda as c; c.fwd", "flash_attn_2_cuda.fwd", "flash_attn_gpu"),
        ("from flash_attn.models.bert import BertModel", "flash_attn.models.bert.BertModel", "checkpoints"),
        ("import flash_attn.utils.benchmark", "flash_attn.utils.benchmark", "helper"),
        ("from flash_attn.modules.mha import ParallelMHA", "flash_attn.modules.mha.ParallelMHA", "process group"),
        ("from flash_attn import nothing", "flash_attn.nothing", "2.8 has no such name"),
        ("import flash_attn.nothing", "flash_attn.nothing", "2.8 has no such"),
        ("from flash_attn import flash_attn_func as f\nf(1, 2, 3, s_aux=4)", "flash_attn.flash_attn_func(s_aux=)",
         "2.8 has no such argument"),
        ("from flash_attn.modules.mha import MHA\nMHA(8, 2, dwconv=True)", "flash_attn.modules.mha.MHA(dwconv=)",
         "must be False"),
    ],
)  # fmt: skip
def test_refused(source, what, why):
    verdicts = {name: verdict for (_, name), verdict in found(source).items()}
    assert verdicts[what][0] == compat.REFUSED
    assert why in verdicts[what][1]


def test_arguments_by_name_and_by_place():
    verdicts = found(
        """
        import flash_attn
        flash_attn.flash_attn_func(q, k, v, 0.0, None, True, (-1, -1), 0.0, None, True)
        flash_attn.flash_attn_func(q, k, v, deterministic=False, **more)
        flash_attn.flash_attn_varlen_func(*some, block_table=None)
        flash_attn.flash_attn_varlen_func(*some, block_table=table, causal=True)
        """
    )
    func, varlen = "flash_attn.flash_attn_func", "flash_attn.flash_attn_varlen_func"
    assert verdicts[3, f"{func}(deterministic=)"][0] == compat.LIMITED
    assert verdicts[3, f"{func}(causal=)"] == (compat.SERVED, "")
    assert verdicts[4, f"{func}(deterministic=)"] == (compat.SERVED, "")
    assert verdicts[4, f"{func}(**)"] == (compat.SERVED, "its arguments cannot be told from here")
    assert verdicts[5, f"{varlen}(block_table=)"] == (compat.SERVED, "")
    assert verdicts[6, f"{varlen}(block_table=)"] == (compat.LIMITED, "forward only: pages have no gradient")
    assert (6, f"{varlen}(q=)") not in verdicts


def test_a_value_that_is_not_told_may_be_the_one_that_is_wanted():
    verdicts = found("from flash_attn.modules.mha import MHA\nMHA(8, 2, dwconv=config.dwconv)")
    assert verdicts[2, "flash_attn.modules.mha.MHA(dwconv=)"][0] == compat.LIMITED


def test_results_of_old_versions():
    source = """
        from flash_attn.bert_padding import unpad_input
        a, b, c, d = unpad_input(x, mask)
        a, b, c, d, *_ = unpad_input(x, mask)
        a, b, c, d, e = unpad_input(x, mask)
        """
    told = [(line, why) for (line, what), (_, why) in found(source).items() if what.endswith("()")]
    assert told == [(3, "4 results, as up to flash_attn 2.6: profile 2.6.3 gives them")]


def test_a_project_is_read_and_the_exit_code_says_whether_all_is_served(tmp_path, capsys):
    (tmp_path / "model.py").write_text(
        "from flash_attn import flash_attn_func\nflash_attn_func(q, k, v, causal=True)\n"
    )
    (tmp_path / "other.py").write_text("import torch\nfrom .flash_attn import mine\nflash_attn_func(1)\n")
    hidden = tmp_path / ".venv" / "lib"
    hidden.mkdir(parents=True)
    (hidden / "theirs.py").write_text("import flash_attn.cute\n")
    assert compat.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/model.py:1: flash_attn.flash_attn_func: served",
        "names and arguments: 5 served, 0 served with a limit, 0 refused",
    ]
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "other.py").write_text("try:\n    import flash_attn.cute\nexcept ImportError:\n    pass\n")
    assert compat.main([str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "other.py:2: flash_attn.cute: refused: it is FlashAttention 4" in told.out
    assert "broken.py: cannot be read: " in told.err
    assert compat.main([str(tmp_path / "broken.py")]) == 2
    capsys.readouterr()
    assert compat.main([str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path}/nowhere: there is no such file or folder" in capsys.readouterr().err


def test_a_path_that_is_not_there_is_not_passed_over(tmp_path, capsys):
    (tmp_path / "a.py").write_text("import flash_attn\n")
    assert compat.main([str(tmp_path / "a.py"), str(tmp_path / "b.py")]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/b.py: there is no such file or folder\n"


def test_a_file_with_zero_bytes_cannot_be_read(tmp_path, capsys):
    (tmp_path / "a.py").write_bytes(b"import flash_attn\0\n")
    assert compat.main([str(tmp_path)]) == 2
    assert "a.py: cannot be read: " in capsys.readouterr().err


def test_a_project_without_flash_attn(tmp_path, capsys):
    (tmp_path / "a.py").write_text("import torch\n")
    assert compat.main([str(tmp_path / "a.py")]) == 0
    assert capsys.readouterr().out == "no name of flash_attn is imported\n"


def test_limits_are_of_names_and_arguments_that_there_are():
    for dotted, arguments in limits.ARGUMENTS.items():
        assert compat.of_name(dotted)[0] != compat.REFUSED, dotted
        assert set(arguments) <= set(compat._parameters(dotted) or ()), dotted
    for dotted in limits.NAMES:
        assert compat.of_name(dotted)[0] == compat.LIMITED, dotted


def test_arguments_that_nothing_looks_at_are_told_of():
    functions = [
        (f"{module}.{name}", compat._parameters(f"{module}.{name}"), getattr(compat.offered(module), name))
        for module in flash_attn_names.modules()
        for name in flash_attn_names.offered(module)
    ]
    looked_into = 0
    for dotted, parameters, thing in functions:
        if parameters is None or dotted in limits.NAMES:
            continue
        source = textwrap.dedent(inspect.getsource(thing.__init__ if inspect.isclass(thing) else thing))
        looked_at = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        told = limits.ARGUMENTS.get(compat._canonical(dotted), {})
        assert set(parameters) <= looked_at | set(told), dotted
        looked_into += 1
    assert looked_into > 50


@pytest.mark.parametrize("dotted", [name for name, arguments in limits.ARGUMENTS.items()
                                    if any(limit.refused for limit in arguments.values())])  # fmt: skip
def test_arguments_that_are_refused_raise(dotted):
    """Before anything else is looked at, or with the least that a name needs."""
    module, _, name = dotted.rpartition(".")
    thing = getattr(compat.offered(module), name)
    needed = {"embed_dim": 8, "num_heads": 2, "dim": 64, "activation": "relu"}
    for argument, limit in limits.ARGUMENTS[dotted].items():
        if limit.refused:
            parameters = compat._parameters(dotted) or []
            given = {one: needed[one] for one in parameters if one in needed}
            missing = {one: None for one in ("x", "weight", "weight1", "weight2", "bias", "logits", "labels", "config")
                       if one in parameters}  # fmt: skip
            with pytest.raises(ValueError, match=f"{argument} must be"):
                thing(**(missing | given | {argument: object()}))


def test_reasons_are_of_modules_that_are_not_offered():
    for module in refused.MODULES:
        assert compat.offered(module) is None
        assert compat.of_name(module)[0] == compat.REFUSED
    for module in refused.NAMES:
        assert importlib.import_module(f"compiled_fa.drop_in.v2_7_4.{module}")

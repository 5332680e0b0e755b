"""The cycle bounds of tools/offline/machine_code.py, on short texts as nvdisasm prints them."""

import pytest

machine_code = pytest.importorskip("tools.offline.machine_code", reason="triton is not installed", exc_type=ImportError)

KERNEL = """
.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/                   LDSM.16.MT88.2 R8, [R2+0x100] ;
        /*0030*/              @!P0 FMUL R10, R10, R11 ;
        /*0040*/                   IMAD.WIDE R12, R13, R14, c[0x0][0x160] ;
        /*0050*/                   HMMA.1688.F32 R16, R4, R8, R16 ;
        /*0060*/                   HMMA.1688.F32 R20, R4, R9, R20 ;
        /*0070*/                   F2F.F16.F32 R10, R10 ;
        /*0080*/                   STS.128 [R2], R4 ;
        /*0090*/                   IADD3 R3, R3, 0x1, RZ ;
        /*00a0*/                   ISETP.NE.U32.AND P1, PT, R3, RZ, PT ;
        /*00b0*/                   BAR.SYNC 0x0 ;
        /*00c0*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_3);
"""


def test_the_bound_of_every_unit():
    (loop,) = machine_code.inner_loops(KERNEL)
    assert loop.bounds == {
        "tensor": 2 * 8,
        "fp32": 2 * 2,  # FMUL, IMAD
        "alu": 2 * 2,
        "mufu": 8,
        "shared": 4 * 2 * (4 + 2 + 4),  # four sub-cores; 128 bytes take two cycles
        "issue": 12,
    }
    assert loop.counts["HMMA"] == 2


def test_only_loops_without_a_loop_inside():
    nested = """
.L_x_1:
        /*0000*/                   MUFU.EX2 R1, R1 ;
.L_x_2:
        /*0010*/                   FFMA R1, R1, R1, R1 ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
"""
    (loop,) = machine_code.inner_loops(nested)
    assert loop.counts == {"FFMA": 1, "BRA": 1}


def test_two_branches_to_one_label_are_one_loop():
    continued = """
.L_x_1:
        /*0000*/                   FADD R1, R1, R1 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   FMUL R1, R1, R1 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
"""
    (loop,) = machine_code.inner_loops(continued)
    assert loop.counts == {"FADD": 1, "FMUL": 1, "BRA": 2}


@pytest.mark.parametrize(
    ("text", "unit", "cycles"),
    [
        ("IMMA.8816.S8.S8.SAT R4, R2.ROW, R3.COL, R4", "tensor", 4),
        ("LDS.U.64 R4, [R2]", "shared", 16),
        ("LDSM.16.M88 R4, [R2]", "shared", 8),
        ("STS [R2], R4", "shared", 8),
        ("MUFU.RCP R4, R2", "mufu", 8),
        ("FMNMX R4, R2, R3, !PT", "alu", 2),
    ],
)
def test_rates(text, unit, cycles):
    sass = f".L_x_0:\n        /*0000*/     {text} ;\n        /*0010*/     BRA `(.L_x_0) ;\n"
    (loop,) = machine_code.inner_loops(sass)
    assert {name: n for name, n in loop.bounds.items() if n} == {unit: cycles, "issue": 2}


def test_no_loop():
    assert machine_code.inner_loops("        /*0000*/     EXIT ;\n.L_x_1:\n        /*0010*/     BRA `(.L_x_1);\n") == []

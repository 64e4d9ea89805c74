"""torch.export: a program keeps the operators by name, and runs where the package is imported."""

import torch

import engram_kernels as ek


class Edited(torch.nn.Module):
    """A graft and a memory, whose number of rows is a symbol."""

    def forward(self, pre, ft, logits, A, B):
        return ek.graft_blend(pre, ft, logits, bias=0.5), ek.memory_solve(A, B, ridge=0.1)


def test_an_exported_program_is_saved_and_loaded(tmp_path):
    rows = torch.export.Dim("rows", min=2)
    args = *torch.randn(3, 40), torch.eye(3), torch.randn(3, 2)
    shapes = {"pre": {0: rows}, "ft": {0: rows}, "logits": {0: rows}, "A": None, "B": None}
    program = torch.export.export(Edited(), args, dynamic_shapes=shapes)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    ours = torch.ops.engram_kernels
    assert {ours.graft_blend.default, ours.memory_solve.default} <= called
    torch.export.save(program, tmp_path / "edited.pt2")
    loaded = torch.export.load(tmp_path / "edited.pt2").module()
    for size in (40, 13):
        given = *torch.randn(3, size), torch.eye(3), torch.randn(3, 2)
        for mine, truth in zip(loaded(*given), Edited()(*given), strict=True):
            assert torch.equal(mine, truth)

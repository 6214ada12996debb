import pytest

from hf_distill import DistillError
from hf_distill.layers import last, map_layers, stretch, uniform


def test_uniform_is_the_published_formula():
    mapping = dict(uniform(32, 80))
    assert (mapping[0], mapping[15], mapping[31]) == (0, 38, 78)
    assert uniform(4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize(("n_student", "n_teacher"), [(32, 80), (1, 12), (5, 5), (12, 6), (2, 3)])
def test_mappings_have_existing_layers_and_stretch_pairs_the_endpoints(n_student, n_teacher):
    for pairs in (uniform(n_student, n_teacher), stretch(n_student, n_teacher)):
        assert [s for s, _ in pairs] == list(range(n_student))
        assert all(0 <= t < n_teacher for _, t in pairs)
        assert [t for _, t in pairs] == sorted(t for _, t in pairs)
    assert stretch(n_student, n_teacher)[-1] == (n_student - 1, n_teacher - 1)
    if n_student > 1:
        assert stretch(n_student, n_teacher)[0] == (0, 0)


def test_last_pairs_the_last_layers():
    assert last(4, 10, 2) == map_layers("last:2", 4, 10) == [(2, 8), (3, 9)]


def test_explicit_pairs_are_not_changed():
    assert map_layers([[3, 9], [1, 2]], 4, 10) == [(3, 9), (1, 2)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([[4, 9]], r"\[\[4, 9\]\] do not exist: .* 0 to 3 and the teacher 0 to 9"),
        ([[-1, 9]], "do not exist"),
        ("last:5", "last:5 needs 5 layers of each model, and the student has 4 and the teacher 10"),
        ("last:0", "it must be kept, uniform, stretch, last:N, learned, or .student, teacher. pairs"),
        ("strech", "it must be kept, uniform, stretch"),
        ([], "it must be"),
        ([[1, 2, 3]], "it must be"),
        ([[True, 2]], "it must be"),
        (["ab"], "it must be"),
        ({"3": 9}, "it must be"),
    ],
)
def test_an_invalid_mapping_names_the_valid_ones(spec, message):
    with pytest.raises(DistillError, match=message):
        map_layers(spec, 4, 10)

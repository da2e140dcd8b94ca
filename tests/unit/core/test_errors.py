import pytest

from serverlessllm.core import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.SLLMError)
]


@pytest.mark.parametrize("error", CLASSES, ids=lambda e: e.__name__)
def test_every_error_has_its_place_in_the_contract(error):
    assert error.status in {
        400,
        401,
        403,
        404,
        405,
        408,
        409,
        413,
        415,
        429,
        431,
        500,
        502,
        503,
        504,
        507,
    }
    assert error.code
    assert error.code == error.code.lower()
    assert error.type.endswith("_error")
    assert error.__doc__


def test_two_errors_never_share_a_code():
    leaves = [e for e in CLASSES if e not in {errors.SLLMError, errors.ClientError}]
    codes = [e.code for e in leaves if e is not errors.InvalidRequest]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("error", CLASSES, ids=lambda e: e.__name__)
def test_only_faults_that_pass_invite_a_retry(error):
    if error.status < 500 and error.status not in {408, 429}:
        assert error.permanent

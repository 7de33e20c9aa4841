"""Many small cases in one test."""

import functools
import inspect


def together(names, cases):
    """Run a test over all cases at once, where a test costs more than what a case has to do.

    Takes what ``pytest.mark.parametrize`` does: names, divided by commas or in a tuple, and for
    each case a value, or as many as there are names. The error of a case names it.
    """
    if isinstance(names, str):
        names = tuple(names.replace(",", " ").split())
    cases = [case if len(names) > 1 else (case,) for case in cases]

    def decorate(test):
        signature = inspect.signature(test)

        @functools.wraps(test)
        def run(**arguments):
            for case in cases:
                values = dict(zip(names, case, strict=True))
                try:
                    test(**arguments, **values)
                except Exception as error:
                    error.add_note(f"with {values}")
                    raise

        run.__signature__ = signature.replace(
            parameters=[given for name, given in signature.parameters.items() if name not in names]
        )
        return run

    return decorate

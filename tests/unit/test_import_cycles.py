"""No module imports itself by way of others. (The `__init__` of a package imports its modules, so it is left out.)"""

from graphlib import CycleError, TopologicalSorter

from tests.unit.test_imports import FILES, PACKAGES, imports, module_of


def test_imports_have_no_cycles() -> None:
    modules = {module_of(path): path for path in FILES}
    graph = {
        module: {
            name for name, at_once in imports(path) if at_once and name in modules and name not in PACKAGES
        }
        for module, path in modules.items()
    }
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"modules that import each other: {' -> '.join(error.args[1])}") from None
    assert set(order) >= set(modules) - PACKAGES

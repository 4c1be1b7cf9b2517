# SPDX-License-Identifier: Apache-2.0
# The macros of the BUILD files. Metadata stays in each package's pyproject.toml; these read it and never repeat it.


# What needs torch: these directories of the library. Nothing else of it depends on them, nor do the data tools.
TORCH_HALF = ("model", "parallel", "checkpoint", "objectives", "generation")
NO_TORCH = (
    *("!//*/requirements#{}".format(name) for name in ("torch", "safetensors")),
    *("!//libneox/src/libneox/{}/**".format(name) for name in TORCH_HALF),
)


def neox_package(project):
    """PROJECT/BUILD: what the package requires, and its wheel."""
    python_requirements(
        name="requirements",
        source="pyproject.toml",
        # `libneox==...` of a command means our own sources, so its entry must not own the import.
        module_mapping={"libneox": ["_libneox_is_first_party_"], "tiktoken": ["tiktoken", "tiktoken_ext"]},
    )
    resources(name="metadata", sources=["pyproject.toml", "README.md"])
    python_distribution(
        name="wheel",
        dependencies=["//{}/src:src".format(project), ":metadata"],
        provides=python_artifact(name=project),
        generate_setup=False,
        sdist=False,
    )


def neox_sources(data=()):
    """PROJECT/src/BUILD: a directory of its own, because that is what makes it the root that imports start from."""
    if data:
        resources(name="data", sources=list(data))
    python_sources(name="src", sources=["**/*.py"], dependencies=[":data"] if data else [])


def neox_library_rules():
    """libneox/src/BUILD: the library depends on no command, and its torch-free half on nothing that needs torch."""
    __dependencies_rules__(
        ([{"path": "/libneox/{}/**".format(name)} for name in TORCH_HALF], "//libneox/**", "!*"),
        ("*", *NO_TORCH, "//libneox/**", "!*"),
    )


def neox_command_rules(project, torch):
    """PROJECT/src/BUILD: a command depends on the library and on what it requires itself, never on another command.

    torch: whether it may need the library's torch half; the data tools may not.
    """
    __dependencies_rules__(("*", *(() if torch else NO_TORCH), "//{}/**".format(project), "//libneox/**", "!*"))


def neox_tests(commands=(), modules=(), torch=False, conftest=True, sources=("test_*.py",), name="tests"):
    """The tests of one directory.

    commands, modules: packages and library modules that the tests run as processes, which no import shows.
    torch: they need torch or what needs it; `--tag=-torch` leaves them out.
    """
    if conftest:
        python_test_utils(name="conftest", sources=["conftest.py"])
    python_tests(
        name=name,
        sources=list(sources),
        dependencies=[
            "//tests:plugins",
            *["//{}/src:src".format(command) for command in commands],
            *["//libneox/src/libneox/{}.py:../src".format(module) for module in modules],
        ],
        tags=["torch"] if torch else [],
        timeout=300,
    )

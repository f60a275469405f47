"""The packages that bugs are made in. Held out are whole packages, never single functions."""

from kat_swe.source import Package, Release

_TYPING_EXTENSIONS = Release(
    "typing-extensions",
    "4.12.2",
    "1a7ead55c7e559dd4dee8856e3a88b41225abfe1ce8df57b7c13915fe121ffb8",
)

PACKAGES = (
    Package(
        Release(
            "boltons", "26.2.0", "d39cfd15c1a1c3bd4d705c82252fa9edb8e4f5e8cc039f8e39afac7b1b47e92c"
        ),
        "boltons",
        ("tests",),
        older=(
            Release(
                "boltons",
                "26.1.0",
                "5764468aba493b15995ed17f46a16789023f123ca2a62d491a9ce825c1cbe26c",
            ),
        ),
    ),
    Package(
        Release(
            "pydash", "8.1.0", "30914c3e9d377ea2cd0d3c0a4f252889b08392f730a5eb4d117e5b598cdf1d52"
        ),
        "src/pydash",
        (
            "tests/test_arrays.py",
            "tests/test_collections.py",
            "tests/test_numerical.py",
            "tests/test_objects.py",
            "tests/test_predicates.py",
            "tests/test_strings.py",
            "tests/test_utilities.py",
        ),
        needs=((_TYPING_EXTENSIONS, "src/typing_extensions.py"),),
    ),
    Package(
        Release(
            "pyrsistent",
            "0.20.0",
            "4c48f78f62ab596c679086084d0dd13254ae4f3d6c72a83ffdf5ebdef8f265a4",
        ),
        "pyrsistent",
        ("tests",),
    ),
    Package(
        Release(
            "anytree", "2.13.0", "c9d3aa6825fdd06af7ebb05b4ef291d2db63e62bb1f9b7d9b71354be9d362714"
        ),
        "src/anytree",
        ("tests",),
        is_held_out=True,
    ),
    Package(
        Release(
            "tinydb", "4.9.0", "6928b1fa785186bda7952a0ba05aaeedc883ede565ca9c7d608de44e5e75de70"
        ),
        "tinydb",
        ("tests",),
        is_held_out=True,
    ),
    Package(
        Release("funcy", "2.1", "8979feb3de7120afd1d00e5a8eae810c1942e4bfbc91697151e9ee1e49f79284"),
        "funcy",
        ("tests",),
    ),
    Package(
        Release(
            "validators",
            "0.36.0",
            "92ad9ed00bbed320b784cec0ea90b213cf08904cf605b3d0852cfa4108e32a2c",
        ),
        "src/validators",
        ("tests",),
    ),
    Package(
        Release(
            "parse", "1.22.4", "706d458feed5a81b02768d3156e8070baf6cee7d150a3a3c0cd43101a875c3b5"
        ),
        "parse",
        ("tests",),
    ),
    Package(
        Release(
            "semver", "3.1.2", "bea193552413194252d33ff26ce0962b76669bd1c6fb17e8e203ac37f072feaf"
        ),
        "src/semver",
        ("tests",),
    ),
    Package(
        Release(
            "toolz", "1.2.0", "9667a038e9d6ecba37995e26cb2f59ec6420b6ad8dd9677de59db9b956b08490"
        ),
        "toolz",
        ("toolz/tests",),
        is_held_out=True,
    ),
    Package(
        Release(
            "inflection",
            "0.5.1",
            "1a29730d366e996aaacffb2f1f1cb9593dc38e2ddd30c91250c6dde09ea9b417",
        ),
        "inflection",
        ("test_inflection.py",),
        is_held_out=True,
    ),
    Package(
        Release(
            "webcolors",
            "25.10.0",
            "62abae86504f66d0f6364c2a8520de4a0c47b80c03fc3a5f1815fedbef7c19bf",
        ),
        "src/webcolors",
        ("tests",),
        is_held_out=True,
    ),
    Package(
        Release(
            "isodate", "0.7.2", "4cd1aa0f43ca76f4a6c6c0292a85f40b35ec2e43e315b59f06e6d32171a953e6"
        ),
        "src/isodate",
        ("tests",),
        is_held_out=True,
    ),
)

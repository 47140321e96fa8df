"""Wrong options, sparsities, patterns and targets: one or two lines say what to do, and nothing is written."""

import pytest
from command import MAGNITUDE, PRUNE, TEXT, Q, done, refused

SEARCH = ("search", "model", "--sparsity", "0.5", "--output", "found", *TEXT, "--criterion", "wanda")


def test_a_correct_command_is_accepted(place):
    assert done(*PRUNE, "--json").json["sparsity"] == 0.5


@pytest.mark.parametrize(
    "arguments, match",
    [
        (
            (*PRUNE, "--criterion", "wnada"),
            r"Unknown criterion 'wnada'\. Did you mean 'wanda'\? There are: magnitude, wanda, ",
        ),
        (
            (*PRUNE, "--allocator", "alphaprune"),
            r"Unknown allocator 'alphaprune'\. Did you mean 'alphapruning'\? There are: uniform, .*, rco, auto\.",
        ),
        (
            ("plan", "table.json", "--allocator", "alpha", "--sparsity", "0.5"),
            r"Unknown allocator 'alpha'\. Did you mean 'alphapruning'\?",
        ),
        (
            ("measure", "model", "-o", "t.json", "--metrics", "alpha_peek"),
            r"Unknown metric 'alpha_peek'\. Did you mean 'alpha_peak'\? There",
        ),
        (("measure", "model", "-o", "t.json", "--metrics", ","), "--metrics names none: give one, such as alpha_peak"),
        (("measure", "model", "-o", "t.json", "--metrics", "outlier_ratio:zero", *TEXT), r"outlier_ratio.*zero"),
        (
            (*PRUNE, "--allocator", "alphapruning", "--set", "metric=alpha_pack"),
            r"Unknown metric 'alpha_pack'\. Did you mean 'alpha_peak'\?",
        ),
        (
            (*PRUNE, "--allocator", "alphapruning", "--set", "epsilom=0.3"),
            r"option 'epsilom'\. Did you mean 'epsilon'\? Their options: ",
        ),
        ((*PRUNE, "--criterion", "sparsegpt", "--set", "damp=0.1"), r"option 'damp'\. Did you mean 'damping'\?"),
        (
            (*PRUNE, "--allocator", "alphapruning", "--set", "epsilon=lots"),
            r"epsilon='lots' is not a valid float \(default 0\.3\)",
        ),
        ((*PRUNE, "--allocator", "alphapruning", "--set", "epsilon=2"), r"epsilon must be in \[0, 1\], got 2"),
        ((*PRUNE, "--allocator", "alphapruning", "--set", "epsilon=-0.1"), r"epsilon must be in \[0, 1\], got -0\.1"),
        ((*PRUNE, "--allocator", "sensitivity", "--set", "epsilon=-0.1"), r"epsilon must be in \[0, 1\], got -0\.1"),
        (
            (*PRUNE, "--recipe", "owl@7"),
            r"Unknown recipe 'owl@7'\. Did you mean 'owl@70'\? See: billhook ls recipes",
        ),
        (
            (*SEARCH, "--budget", "0"),
            r"A budget of zero finds nothing: give at least one trial \(--budget 1\), or some minutes",
        ),
        ((*SEARCH, "--budget", "0m"), r"A budget of zero finds nothing"),
        (
            (*SEARCH, "--budget", "soon"),
            r"The budget 'soon' is neither a number of trials, such as 9, nor of minutes, such as 5m",
        ),
        (
            (*SEARCH, "--allocator", "atp", "--set", "beta=0.1"),
            r"beta is what the search chooses for atp: leave out --set beta",
        ),
        (
            (*SEARCH, "--set", "damping=0.1"),
            r"Neither allocator 'alphapruning' or 'atp'.* nor criterion 'wanda' has an option 'damping'",
        ),
        ((*SEARCH, "--samples", "3"), r"3 different windows are too few to split into calibration and held-out ones"),
        (
            (*SEARCH[:5], "model/found", *SEARCH[6:]),
            r"The output .*found contains the source model .*model or is inside it",
        ),
        (
            (*PRUNE, "--allocator", "atp", "--set", "beta=3"),
            r"ATP's beta must be in \[0, 1\] for 2 blocks at sparsity 0\.5, got 3",
        ),
        ((*PRUNE, "--set", "epsilon"), r"--set epsilon: write KEY=VALUE"),
        ((*PRUNE, "--allocator", "owl", "--set", "lam=0.1", "--set", "lam=0.2"), "--set lam is given twice"),
        (("ls", "allocator"), r"Unknown kind 'allocator'\. Did you mean 'allocators'\? There are: "),
        (("prnue", "model"), r"No such command 'prnue'.*See: billhook --help"),
        (("prune",), r"Missing argument.*See: billhook prune --help"),
        ((*PRUNE, "--sparcity", "0.5"), r"No such option: --sparcity.*--sparsity"),
        ((*PRUNE, "--group", "column"), r"--group"),
        ((*PRUNE, "--dtype", "int8"), r"--dtype"),
        ((*PRUNE, "--device", "gpu"), r"Cannot compute on device 'gpu'"),
        ((*PRUNE, "--samples", "0"), r"--samples"),
        (
            (*PRUNE[:3], "pruned", "--sparsity", "0.5"),
            r"needs activations: give text with --calibration FILE\.txt",
        ),
        (("prune", "model", "--sparsity", "0.5", *TEXT), r"--output DIRECTORY \(or --dry-run"),
        (("eval", "model"), r"Say what to score: --data FILE\.txt"),
        (("verify", "model"), r"no record of a pruned model at model/billhook\.json"),
    ],
    ids=lambda value: value.split(r"\.")[0][:40] if isinstance(value, str) else "",
)
def test_unknown_names_and_options_are_refused(place, arguments, match):
    refused(place, *arguments, match=match)


@pytest.mark.parametrize("sparsity", ["1", "1.0", "-0.1", "50", "nan", "inf"])
def test_a_sparsity_out_of_range_is_refused(place, sparsity):
    message = r"Sparsity must be a number in \[0, 1\), the fraction removed; got .*\. Use 0\.5 for half"
    refused(place, *MAGNITUDE, f"--sparsity={sparsity}", match=message)
    refused(place, "plan", "table.json", "--allocator", "atp", f"--sparsity={sparsity}", match=message)


@pytest.mark.parametrize("sparsity", ["half", "%", "0,5"])
def test_a_sparsity_that_is_no_number_is_refused(place, sparsity):
    refused(place, *MAGNITUDE, f"--sparsity={sparsity}", match=r"--sparsity.*number.*See: billhook prune --help")


def test_a_missing_sparsity_is_refused(place):
    refused(place, *MAGNITUDE, match=r"--sparsity 0\.5 removes half")


@pytest.mark.parametrize("pattern", ["4:2", "2-4", "2:4:8", "structured", "0:4", ""])
def test_strings_that_are_no_pattern_are_refused(place, pattern):
    refused(place, *MAGNITUDE, f"--pattern={pattern}", match="neither 'unstructured' nor N:M")


def test_a_pattern_that_does_not_divide_a_layer_is_refused(place):
    message = rf"Pattern 2:5 is impossible for {Q}: its 32 columns do not divide by 5\. Leave out .*--ignore"
    refused(place, *MAGNITUDE, "--pattern", "2:5", match=message)


def test_a_pattern_that_contradicts_the_sparsity_is_refused(place):
    refused(
        place,
        *MAGNITUDE,
        "--pattern",
        "2:4",
        "--sparsity",
        "0.6",
        match=r"keeps 2 of every 4: its sparsity is 0\.5, not 0\.6",
    )


@pytest.mark.parametrize(
    "arguments, match",
    [
        (
            ("--targets", "q_porj"),
            r"--targets q_porj matches no prunable layer\..*List them with billhook prune MODEL --dry-run",
        ),
        (("--targets", "Linaer"), r"Did you mean 'Linear'\?"),
        (("--ignore", "re:.*lm_head"), r"--ignore 're:\.\*lm_head' matches no prunable layer"),
        (("--ignore", "re:(["), r"--ignore 're:\(\[': not a regular expression"),
        (("--ignore", "Linear"), "leave no layer to prune"),
    ],
    ids=str,
)
def test_target_patterns_that_match_nothing_are_refused(place, arguments, match):
    refused(place, *MAGNITUDE, "--sparsity", "0.5", *arguments, match=match)

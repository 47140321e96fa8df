"""Commands on what other commands made: files, adapters and decoded directories are named for what they are."""

import tiny
from command import TEXT, done, refused

UNIFORM = ("--allocator", "uniform", "--sparsity", "0.5")


def test_a_conversion_is_quiet_and_its_file_is_named_by_every_command(place):
    ran = done("export", "model", "--to", "gguf", "-o", "model.gguf", "--json")
    assert ran.json["output"].endswith("model.gguf")
    assert "Loading" not in ran.err
    refused(
        place,
        "verify",
        "model.gguf",
        match=r"model\.gguf is a file: no billhook\.json beside it .*: verify the directory",
    )
    refused(place, "report", "model.gguf", match=r"model\.gguf is a file\.")


def test_an_adapter_is_named_before_what_it_lacks(place):
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "model"}')
    (place / "adapter" / "billhook.json").write_text('{"steps": [{"step": "recover"}]}')
    for command in (("report", "adapter"), ("generate", "adapter", "Once")):
        refused(place, *command, match="adapter holds an adapter of model, not a whole model")


def test_a_decoded_directory_has_no_report_but_its_card(place):
    tiny.save(place / "wide", tiny.llama(num_hidden_layers=1))
    done("quantize", "wide", "--type", "int8/32", "--quantizer", "round", "-o", "int8")
    done("export", "int8", "--to", "dense", "-o", "decoded")
    said = r"its last step is 'export'\. There is no report of that but its README\.md\."
    refused(place, "report", "decoded", match=said)


def test_files_of_a_model_and_files_that_are_read_are_not_replaced(place):
    weights = (place / "model" / "model.safetensors").read_bytes()
    taken, own = r"is a file of the model, or one that is read: choose another", "model/model.safetensors"
    for output in (own, "model/config.json", "model/tokenizer.json"):
        export = ("export", "model", "--to", "gguf", "-o", output, "--overwrite")
        for command in (export, ("measure", "model", "-o", output), ("plan", "table.json", *UNIFORM, "-o", output)):
            refused(place, *command, match=taken)
    for command in ("imatrix", "gradients"):
        refused(place, command, "model", *TEXT, "-o", own, match=taken)
    refused(place, "plan", "table.json", *UNIFORM, "-o", "table.json", match=taken)
    done("export", "model", "--to", "gguf", "-o", "model/model.gguf")
    done("export", "model", "--to", "gguf", "-o", "model/model.gguf", "--overwrite")
    again = ("--to", "gguf", "-o", "model/model.gguf", "--overwrite")
    refused(place, "export", "model/model.gguf", *again, match=taken)
    refused(place, "export", "model", *again, "--template", "model/model.gguf", match=taken)
    assert (place / "model" / "model.safetensors").read_bytes() == weights

"""Steps turn a model directory into another one: request, checked job, directory."""

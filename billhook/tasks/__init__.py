"""What goes into a model and what good means, named as Hugging Face pipelines are."""

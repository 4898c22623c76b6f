"""A CUDA build of torch and rasa_ext on GPUs that are not there."""

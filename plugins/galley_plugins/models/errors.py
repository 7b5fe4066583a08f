"""What can go wrong between a model's name and a folder that can be served."""


class ModelError(Exception):
    """Base of the errors of this package; the message is meant for the user."""


class UnknownModelError(ModelError):
    """A `builtin:` name that is not in the registry."""


class ModelFolderError(ModelError):
    """A local path that is missing or is no checkpoint folder."""


class ModelSourceError(ModelError):
    """The package that carries a built-in model is missing, or its file is not the pinned one."""


class ConversionError(ModelError):
    """A GGUF file with something that the conversion does not know."""


class CacheError(ModelError):
    """The cache folder cannot be read, written, locked, or has too little space."""

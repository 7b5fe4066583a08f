"""From a corpus to a memory, stage by stage; see `build`."""

"""Building blocks of the models: plain `nn.Module`s with HF names that call `ops` and read the batch they are given."""

"""The words every room shares: settings, requests, sampling parameters, outputs, the batch, and errors."""

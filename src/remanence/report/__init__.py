"""From a ledger to text, plots and a page."""

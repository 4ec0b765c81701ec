"""The paper's runs and its result tables, as data."""

"""The app `billing` of a Django site, whose `def` views wait for an approval."""

"""Everything that is promised, tried out: unit, integration, acceptance, architecture."""

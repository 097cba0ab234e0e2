"""`alula compare`: methods x seeds x orders on one stream, and one page that says which differences are more than noise."""

from alula.cli.run import Changes, RayAddress, RecipeFile, RunFolder, Workers, run_cells, show_results


def compare(recipe: RecipeFile, out: RunFolder = None, set_: Changes = None, workers: Workers = None, ray: RayAddress = None) -> None:
    """Run a recipe as `alula run` does, then build the comparison page (compare.html) beside the report."""
    folder, crashed = run_cells(recipe, out=out, changes=set_, workers=workers, ray=ray)
    from alula.report import build_report
    from alula.report.comparison import build_comparison

    pages = {"Report": build_report(folder), "Comparison": build_comparison(folder)}
    show_results(folder, pages, crashed)
